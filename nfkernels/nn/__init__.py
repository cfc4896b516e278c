"""Invertible layers, bases and flows. Start reading at :class:`Bijection` and :class:`Flow`."""

from . import masks
from .actnorm import ActNorm
from .bases import Base, DiagonalNormal, StandardNormal, Uniform
from .bijection import Bijection, Chain, Inverse
from .check import CheckReport
from .circle import CircularNormal, PeriodicFeatures, PeriodicMaskedMLP, PhaseShift
from .columns import Columns
from .conditioners import MLP, ConvConditioner, ResidualNet
from .config import register
from .conv_residual_net import ConvResidualNet
from .coupling import AdditiveCoupling, AffineCoupling, Coupling, SplineCoupling
from .elementwise import Affine, Arctanh, Exp, LeakyReLU, Log, Logit, Sigmoid, Softplus, Tanh
from .elementwise_spline import CircularSpline, ElementwiseSpline
from .emerging_conv import EmergingConv2d
from .flow import Flow
from .glow_steps import GlowSteps
from .graphed_flow import GraphedFlow
from .image_flow import ImageFlow
from .invertible_conv import InvertibleConv1x1
from .learned_bases import MixtureNormal, StudentT
from .linear import BlockDiagonalLinear, DiagonalLinear, FullLinear, TriangularLinear
from .lu_linear import LULinear
from .masked_autoregressive import MaskedAutoregressive
from .masked_mlp import MaskedMLP
from .multi_scale import MultiScale
from .orthogonal import HouseholderOrthogonal, QRLinear
from .periodic_conv import PeriodicConv1d, PeriodicConv2d
from .permutation import Permutation
from .reversible import ReversibleSequential, drift
from .serialize import CheckpointError, load, save
from .split_prior import DiagonalPrior, SplitPrior
from .squeeze import Squeeze
from .standardize import Standardize
from .symmetric_conv import SymmetricConv
from .table_flow import TableFlow
from .transforms import AdditiveTransform, AffineTransform, MixedSplineTransform, SplineTransform
from .variational_dequantization import VariationalDequantization

__all__ = [
    "MLP",
    "ActNorm",
    "AdditiveCoupling",
    "AdditiveTransform",
    "Affine",
    "AffineCoupling",
    "AffineTransform",
    "Arctanh",
    "Base",
    "Bijection",
    "BlockDiagonalLinear",
    "Chain",
    "CheckReport",
    "CheckpointError",
    "CircularNormal",
    "CircularSpline",
    "Columns",
    "ConvConditioner",
    "ConvResidualNet",
    "Coupling",
    "DiagonalLinear",
    "DiagonalNormal",
    "DiagonalPrior",
    "ElementwiseSpline",
    "EmergingConv2d",
    "Exp",
    "Flow",
    "FullLinear",
    "GlowSteps",
    "GraphedFlow",
    "HouseholderOrthogonal",
    "ImageFlow",
    "Inverse",
    "InvertibleConv1x1",
    "LULinear",
    "LeakyReLU",
    "Log",
    "Logit",
    "MaskedAutoregressive",
    "MaskedMLP",
    "MixedSplineTransform",
    "MixtureNormal",
    "MultiScale",
    "PeriodicConv1d",
    "PeriodicConv2d",
    "PeriodicFeatures",
    "PeriodicMaskedMLP",
    "Permutation",
    "PhaseShift",
    "QRLinear",
    "ResidualNet",
    "ReversibleSequential",
    "Sigmoid",
    "Softplus",
    "SplineCoupling",
    "SplineTransform",
    "SplitPrior",
    "Squeeze",
    "StandardNormal",
    "Standardize",
    "StudentT",
    "SymmetricConv",
    "TableFlow",
    "Tanh",
    "TriangularLinear",
    "Uniform",
    "VariationalDequantization",
    "drift",
    "load",
    "masks",
    "register",
    "save",
]
