"""Training flows: data, the loop, checkpoints, evaluation and pictures.

``fit`` trains any flow and is what the command line itself uses; ``load_images`` and ``split`` read image sets,
``load_table`` tables. Each name is imported at first use, so that the command line can print its help without torch;
they are listed in ``__init__.pyi``.
"""

from .._lazy import lazy

__getattr__, __dir__, __all__ = lazy(__name__, __file__)
