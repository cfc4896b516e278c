"""Container fusion, opt-in: ``accelerate(model, fuse="steps")`` and ``memory="reversible"``.

Files: ``parts`` (what a layer says of its mathematics), ``chain`` (which modules are chains of such parts, and how
lists of them become runs of equal steps), ``run`` (executes a run through the body that ``nn.GlowSteps`` has),
``containers`` (the modules whose lists are run so), ``normflows`` and ``ports`` (facts), ``layout`` and ``networks``
(channels-last conditioners).
"""

from . import normflows, ports
from .containers import Steps, container
from .layout import channels_last, put_back
from .networks import network

__all__ = ["Steps", "channels_last", "container", "network", "normflows", "ports", "put_back"]
