"""Layers known by their parameters' names, shapes and signatures: Glow ports, flows of speech models. Always proved.

Start reading in ``family``. A port that is not recognised most often has another name for a parameter (the tables
``KEYS`` in ``actnorm``, ``FACTORS`` in ``mixing``, ``STRUCTURES`` and ``MAPS`` in ``coupling``) or for an argument
(``ROLES`` in ``convention``): one more entry, and numbers decide whether it is right.

What is looked at when a layer is proved is taken to stay: options kept as attributes (``mean_only``, ``scaling_fn``)
and the zeros and ones of masks. Couplings written inside of a larger module's forward (WaveGlow's, y0ast's FlowStep)
are no modules of their own and stay as they are.
"""
