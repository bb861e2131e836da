"""`ulysses-accel COMMAND ...`: finds the command and runs it."""

from __future__ import annotations

import importlib
import sys

from ulysses_accel.errors import UlyssesAccelError, closest

# Each function takes the arguments after the command and returns the exit code. A command is
# imported only when it runs, so that `ulysses-accel --help` needs neither torch nor accelerate.
COMMANDS: dict[str, str] = {
    "launch": "ulysses_accel.cli.launch:launch",
    "config": "ulysses_accel.cli.config_wizard:configure",
}
_USAGE = (
    "usage: ulysses-accel COMMAND ...\ncommands: {commands}\n"
    "ulysses-accel COMMAND --help says more."
)


def main(argv: list[str] | None = None) -> int:
    """Runs one command.

    Args:
        argv: the arguments after the program's name, those of this process where `None`.

    Returns:
        The exit code: the command's, 2 for a wrong command or setting, 130 after an interrupt.
    """
    arguments = sys.argv[1:] if argv is None else list(argv)
    usage = _USAGE.format(commands=", ".join(COMMANDS))
    if not arguments or arguments[0] in ("-h", "--help"):
        print(usage)
        return 0 if arguments else 2
    name, rest = arguments[0], arguments[1:]
    if name not in COMMANDS:
        print(
            "ulysses-accel: unknown command "
            f"{name[:100]!r}.{closest(name[:100], COMMANDS)}\n{usage}",
            file=sys.stderr,
        )
        return 2
    module, _, function = COMMANDS[name].partition(":")
    try:
        return int(getattr(importlib.import_module(module), function)(rest))
    except UlyssesAccelError as error:
        print(f"ulysses-accel {name}: {error}", file=sys.stderr)
        return 2
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except KeyboardInterrupt:
        return 130
