"""The rules of ARCHITECTURE that a reader would otherwise have to trust."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.sources import (
    PACKAGE,
    ROOT,
    called_name,
    imports,
    module_name,
    python_files,
    text_files,
    tree,
    where,
)

# A folder imports only folders of layers before its own; attention and dataloader meet only in
# `sequence`.
LAYERS = (
    ("errors", "installation", "_private_api"),
    ("distributed",),
    ("sequence",),
    ("config", "dataloader"),
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

PICKLE_MODULES = {
    "pickle",
    "cPickle",
    "_pickle",
    "dill",
    "cloudpickle",
    "shelve",
    "marshal",
    "joblib",
}
UNSAFE_CALLS = {
    *("all_gather_object", "gather_object", "broadcast_object_list", "scatter_object_list"),
    *(
        "send_object_list",
        "recv_object_list",
        "load_custom_state",
        "register_for_checkpointing",
        "eval",
        "exec",
    ),
}
UNSAFE_YAML = {"yaml.load", "yaml.load_all", "yaml.unsafe_load", "yaml.full_load"}

MAX_FILE_LINES = 600
MAX_LINE_CHARACTERS = 100

CODE = ("ulysses_accel", "examples", "benchmarks")


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


def test_nothing_is_pickled_or_unpickled() -> None:
    wrong = []
    for file in python_files(*CODE):
        wrong += [
            where(file, node)
            for name, node in imports(file)
            if name.split(".")[0] in PICKLE_MODULES
        ]
        for node in ast.walk(tree(file)):
            if isinstance(node, ast.Call) and _is_unsafe(node):
                wrong.append(f"{where(file, node)}: {called_name(node)}")
    assert not wrong


def _is_unsafe(call: ast.Call) -> bool:
    name = called_name(call)
    keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
    # `model.eval()` is not `eval(...)`.
    is_method = "." in name and name.rpartition(".")[2] in ("eval", "exec")
    unsafe = name.rpartition(".")[2] in UNSAFE_CALLS and not is_method
    loads_code = name == "torch.load" and keywords.get("weights_only") != "True"
    return unsafe or loads_code or name in UNSAFE_YAML or keywords.get("weights_only") == "False"


@pytest.mark.parametrize(
    ("source", "unsafe"),
    [
        ("dist.all_gather_object(out, x)", True),
        ("torch.load(path)", True),
        ("torch.load(path, weights_only=True)", False),
        ("yaml.load(text, Loader=yaml.SafeLoader)", True),
        ("yaml.safe_load(text)", False),
        ("load(path, weights_only=False)", True),
        ("model.eval()", False),
        ("eval(text)", True),
    ],
)
def test_the_pickle_policy_sees_what_it_should(source: str, unsafe: bool) -> None:
    call = ast.parse(source, mode="eval").body
    assert isinstance(call, ast.Call)
    assert _is_unsafe(call) is unsafe


def test_files_fit_the_budget() -> None:
    too_long = {
        where(file): lines
        for file in python_files(*CODE, "tests")
        if (lines := len(file.read_text().splitlines())) > MAX_FILE_LINES
    }
    assert not too_long


def test_lines_of_the_package_fit_the_budget() -> None:
    too_long = [
        f"{where(file)}:{number}"
        for file in python_files("ulysses_accel")
        for number, line in enumerate(file.read_text().splitlines(), 1)
        if len(line.partition("  # type: ignore")[0]) > MAX_LINE_CHARACTERS
    ]
    assert not too_long


def test_public_names_have_docstrings() -> None:
    missing = [
        f"{where(file, node)}: {node.name}"
        for file in python_files("ulysses_accel")
        for node in tree(file).body
        if isinstance(node, ast.FunctionDef | ast.ClassDef)
        and not node.name.startswith("_")
        and ast.get_docstring(node) is None
    ]
    undocumented = [
        where(file)
        for file in python_files("ulysses_accel")
        if ast.get_docstring(tree(file)) is None
    ]
    assert not missing + undocumented


def test_importing_the_package_does_not_import_torch() -> None:
    code = "import sys, ulysses_accel; print(sorted({'torch', 'accelerate', 'transformers'} & set(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


def test_public_names() -> None:
    import ulysses_accel

    expected = (Path(__file__).parent / "public_names.txt").read_text().split()
    assert sorted(ulysses_accel.__all__) == expected
    assert all(getattr(ulysses_accel, name) is not None for name in expected)


def test_no_file_names_a_machine() -> None:
    # Written in pieces, or this file would find itself.
    paths = "|".join(
        ["/" + top + "/" for top in ("work", "home", "root", "Users")] + ["/tmp/" + r"\w"]
    )
    hosts = "|".join(
        [
            r"py" + r"pi\.org",
            r"pythonhosted" + r"\.org",
            r"download\.py" + r"torch",
            "npm" + r"js\.org",
        ]
    )
    pattern = re.compile(rf"(?<![\w.]){paths}|{hosts}")
    wrong = [
        f"{where(file)}: {found.group()}"
        for file in text_files()
        if (found := pattern.search(file.read_text())) is not None
    ]
    assert not wrong
