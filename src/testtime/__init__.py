"""Models that go on learning while they are used.

>>> import testtime as tt

loads nothing more. A name of the library is looked up when it is first used, and that loads torch:
the functions and classes of the table below, every method (`tt.Tent`), every part (`tt.demo`).
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    # For type checkers and editors, which do not run `__getattr__`: the same names as in `_public`.
    __version__: str
    from testtime.adaptation.adapted import Adapted as Adapted
    from testtime.adaptation.adapted import adapt as adapt
    from testtime.adaptation.contract import LAWS as LAWS
    from testtime.adaptation.contract import LawBroken as LawBroken
    from testtime.adaptation.contract import check_method as check_method
    from testtime.adaptation.core import Method as Method
    from testtime.adaptation.core import Net as Net
    from testtime.adaptation.core import Objective as Objective
    from testtime.adaptation.core import Settled as Settled
    from testtime.adaptation.doctor import doctor as doctor
    from testtime.adaptation.learner import Learner as Learner
    from testtime.adaptation.methods.actmad import ActMAD as ActMAD
    from testtime.adaptation.methods.bn import BNAdapt as BNAdapt
    from testtime.adaptation.methods.foa import FOA as FOA
    from testtime.adaptation.methods.lame import LAME as LAME
    from testtime.adaptation.methods.source import Source as Source
    from testtime.adaptation.methods.t3a import T3A as T3A
    from testtime.adaptation.methods.tent import Tent as Tent
    from testtime.adaptation.objectives import OpinionEntropy as OpinionEntropy
    from testtime.adaptation.optim import SGD as SGD
    from testtime.adaptation.optim import Adam as Adam
    from testtime.adaptation.optim import AdamW as AdamW
    from testtime.adaptation.report import Report as Report
    from testtime.adaptation.state import State as State

# Each public name and the module that defines it. Methods and submodules find themselves.
_public: dict[str, str] = {
    "Adam": "testtime.adaptation.optim",
    "AdamW": "testtime.adaptation.optim",
    "Adapted": "testtime.adaptation.adapted",
    "LAWS": "testtime.adaptation.contract",
    "LawBroken": "testtime.adaptation.contract",
    "Learner": "testtime.adaptation.learner",
    "Method": "testtime.adaptation.core",
    "Net": "testtime.adaptation.core",
    "Objective": "testtime.adaptation.core",
    "OpinionEntropy": "testtime.adaptation.objectives",
    "Report": "testtime.adaptation.report",
    "SGD": "testtime.adaptation.optim",
    "Settled": "testtime.adaptation.core",
    "State": "testtime.adaptation.state",
    "adapt": "testtime.adaptation.adapted",
    "check_method": "testtime.adaptation.contract",
    "doctor": "testtime.adaptation.doctor",
}


def _submodules() -> list[str]:
    import pkgutil

    return [m.name for m in pkgutil.iter_modules(__path__) if not m.name.startswith("_")]


def _methods() -> dict[str, type]:
    import importlib

    methods = importlib.import_module("testtime.adaptation.methods").METHODS
    return {method.__name__: method for method in methods.values()}


def __getattr__(name: str) -> Any:
    import importlib

    value: Any
    known = {*_public, *_submodules()}
    if name == "__version__":
        from importlib.metadata import version

        value = version("testtime")
    elif name in _public:
        value = getattr(importlib.import_module(_public[name]), name)
    elif name in known:
        value = importlib.import_module(f"testtime.{name}")
    # Methods are classes: any other name is refused without loading torch to look for it.
    elif name[0].isupper() and name in (methods := _methods()):
        value = methods[name]
    else:
        from testtime._suggest import suggest

        if name[0].isupper():
            known.update(methods)
        raise AttributeError(f"testtime has no '{name}'.{suggest(name, known)}")
    globals()[name] = value  # so that the next use costs nothing
    return value


def __dir__() -> list[str]:
    import sys

    # Completion in an editor must not load torch: methods are listed once something else has.
    methods = _methods() if "testtime.adaptation.methods" in sys.modules else {}
    return sorted({*globals(), *_public, *_submodules(), *methods, "__version__"})
