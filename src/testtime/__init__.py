"""Models that go on learning while they are used."""

from testtime.adaptation.adapted import adapt
from testtime.adaptation.doctor import doctor
from testtime.adaptation.methods.tent import Tent
from testtime.adaptation.methods.bn import BNAdapt
from testtime.adaptation.methods.source import Source
