"""Nothing is pickled, on the wire or on disk, and no text is run."""

from __future__ import annotations

import ast

import pytest

from tests.helpers.sources import called_name, imports, python_files, tree, where

CODE = ("ulysses_accel", "examples", "benchmarks")
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
