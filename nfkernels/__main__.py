"""``python -m nfkernels`` is the ``nfkernels`` command."""

from nfkernels.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
