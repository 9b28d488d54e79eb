"""`import testtime`: what it loads, and what it says about names that it does not have."""

import ast
import importlib
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

import testtime


def fresh(code):
    """What a new interpreter prints."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_import_loads_nothing():
    loaded = fresh("import sys; old = {*sys.modules}; import testtime; print({*sys.modules} - old)")
    ours = {name.partition(".")[0] for name in ast.literal_eval(loaded)}
    assert ours - sys.stdlib_module_names == {"testtime"}


def test_dir_loads_no_torch():
    fresh("import sys, testtime; dir(testtime); assert 'torch' not in sys.modules")


def test_public_names_load_torch_and_nothing_heavier():
    fresh(
        "import sys, testtime\n"
        "for name in testtime._public: getattr(testtime, name)\n"
        "heavy = {'timm', 'transformers', 'torchvision', 'pyarrow', 'PIL', 'rich', 'onnx'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)"
    )


@pytest.mark.parametrize("name", sorted(testtime._public))
def test_public_name_is_where_the_table_says(name):
    assert getattr(testtime, name) is getattr(importlib.import_module(testtime._public[name]), name)


def test_type_checkers_see_the_table():
    tree = ast.parse(Path(testtime.__file__).read_text(encoding="utf-8"))
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    seen = {alias.name: node.module for node in imports for alias in node.names if alias.asname}
    # Methods may be listed too; they need no line in the table.
    own = {name: module for name, module in seen.items() if ".methods." not in module}
    assert own == testtime._public


def test_no_public_name_is_a_submodule():
    # The submodule would take the name's place as soon as something imported it.
    assert not set(testtime._public) & set(testtime._submodules())


def test_submodules_are_attributes():
    assert fresh("import testtime; print(testtime.cli.__name__)") == "testtime.cli"


def test_version():
    assert testtime.__version__ == version("testtime")


def test_dir_lists_every_name():
    assert {"__version__", "cli", *testtime._public} <= set(dir(testtime))


def test_unknown_name():
    with pytest.raises(AttributeError, match=r"testtime has no 'cil'\. Did you mean 'cli'\?"):
        testtime.cil  # noqa: B018


def test_unknown_lower_case_and_private_names_load_no_torch():
    fresh(
        "import sys, testtime\n"
        "assert not hasattr(testtime, 'nothing_like_it')\n"
        "assert not hasattr(testtime, '__wrapped__')\n"
        "assert 'torch' not in sys.modules"
    )


# A stand-in for the methods, so that these tests hang on no method.
METHODS = """
import sys, types, testtime
class Tent: pass
methods = types.ModuleType('testtime.adaptation.methods')
methods.METHODS = {'tent': Tent}
sys.modules['testtime.adaptation.methods'] = methods
"""


def test_methods_are_found_by_their_class_name():
    assert fresh(METHODS + "print(testtime.Tent is Tent, 'Tent' in dir(testtime))") == "True True"


def test_unknown_method():
    code = METHODS + "try: testtime.Tentt\nexcept AttributeError as error: print(error)"
    assert fresh(code) == "testtime has no 'Tentt'. Did you mean 'Tent'?"


def test_the_changelog_has_an_unreleased_section():
    text = (Path(__file__).parent.parent / "CHANGELOG.md").read_text(encoding="utf-8")
    assert re.search(r"^## \[Unreleased\]$", text, re.MULTILINE)
