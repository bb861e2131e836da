"""Folders import in one order, so that a reader of one needs only those before it."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

from tests.helpers.sources import (
    PACKAGE,
    ROOT,
    called_name,
    imports,
    module_name,
    python_files,
    tree,
    where,
)

# A folder imports only folders of layers before its own; attention and dataloader meet only in
# `sequence`.
LAYERS = (
    ("errors", "installation", "_private_api"),
    ("distributed",),
    ("sequence",),
    ("config",),
    ("dataloader",),
    ("introspection",),
    ("attention",),
    ("memory",),
    ("forward", "tensor_parallel", "expert_parallel"),
    ("integrations",),
    ("compat", "cli"),
)
LEVELS = {name: level for level, layer in enumerate(LAYERS) for name in layer}
STRANGERS = {frozenset({"attention", "dataloader"})}
# A stock Accelerator hands itself to the config; the config hands it on to the layer that drives
# accelerate.
UPWARD_BY_DESIGN = {("config", "ulysses_accel.integrations.attach")}
DECLARED: set[tuple[str, str]] = set()
WITHOUT_FRAMEWORKS = (
    *("errors", "installation", "distributed", "sequence", "attention.saved_results"),
    *(
        "config.sources",
        "config.settings",
        "config.yaml_file",
        "config.batch_schema",
        "config.split_cost",
    ),
)
FRAMEWORKS = {"accelerate", "deepspeed", "transformers"}
PROCESS_GROUP_MAKERS = {"new_group", "new_subgroups", "init_device_mesh", "DeviceMesh"}


def top_module(dotted: str) -> str:
    """`ulysses_accel.config.yaml_file.x` belongs to `config`."""
    return dotted.partition(".")[2].partition(".")[0]


def package_modules() -> list[Path]:
    # The package's own __init__ names everything and imports nothing until it is asked.
    return [file for file in python_files("ulysses_accel") if file != PACKAGE / "__init__.py"]


def test_every_module_has_a_layer() -> None:
    assert {top_module(module_name(file)) for file in package_modules()} <= set(LEVELS)


def test_lower_layers_do_not_import_higher_ones() -> None:
    wrong, used = [], set()
    for file in package_modules():
        module = module_name(file)
        here = top_module(module)
        for name, node in imports(file):
            there, pair = top_module(name), (module, name.rpartition(".")[0])
            used |= {pair} & DECLARED
            if not name.startswith("ulysses_accel.") or pair in DECLARED:
                continue
            if there != here and LEVELS.get(there, -1) >= LEVELS[here]:
                wrong.append(f"{where(file, node)}: {here} imports {name}")
            if frozenset({here, there}) in STRANGERS:
                wrong.append(f"{where(file, node)}: {here} and {there} must not know each other")
    assert not wrong
    assert used == DECLARED


def test_upward_imports_by_name_are_declared() -> None:
    found = set()
    for file in package_modules():
        here = top_module(module_name(file))
        for node in ast.walk(tree(file)):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                module = node.value.partition(":")[0]
                is_module = re.fullmatch(r"ulysses_accel(\.\w+)+", module) is not None
                if is_module and LEVELS.get(top_module(module), -1) > LEVELS[here]:
                    found.add((here, module))
    assert found <= UPWARD_BY_DESIGN


def test_frameworks_are_imported_only_where_they_are_driven() -> None:
    wrong = [
        f"{where(file, node)}: {name}"
        for file in package_modules()
        for name, node in imports(file)
        if name.split(".")[0] in FRAMEWORKS
        and f"{module_name(file)}.".startswith(
            tuple(f"ulysses_accel.{part}." for part in WITHOUT_FRAMEWORKS)
        )
    ]
    assert not wrong


def test_only_mesh_makes_process_groups() -> None:
    wrong = [
        f"{where(file, node)}: {called_name(node)}"
        for file in package_modules()
        for node in ast.walk(tree(file))
        if isinstance(node, ast.Call)
        and called_name(node).rpartition(".")[2] in PROCESS_GROUP_MAKERS
        and module_name(file) != "ulysses_accel.distributed.mesh"
    ]
    assert not wrong


def test_importing_the_package_does_not_import_torch() -> None:
    code = "import sys, ulysses_accel; print(sorted({'torch', 'accelerate', 'transformers'} & set(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"
