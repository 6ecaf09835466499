"""Approximations of a layer's Fisher block: what is kept of it, and how a gradient is preconditioned with it."""

from keras_ngd.curvature.curvature import Curvature, Slot, refreshed, where_chosen
from keras_ngd.curvature.eigenbasis import EigenbasisCurvature
from keras_ngd.curvature.kernel_inverse import KernelCurvature
from keras_ngd.curvature.kronecker import KroneckerCurvature
from keras_ngd.curvature.rescaled import EKFACCurvature, ExampleEKFACCurvature
from keras_ngd.curvature.rotated_adam import EigenAdamCurvature
from keras_ngd.curvature.split import SplitCurvature
from keras_ngd.curvature.unit_wise import UnitWiseCurvature
from keras_ngd.curvature.woodbury import WoodburyCurvature

__all__ = [
    "Curvature",
    "EKFACCurvature",
    "EigenAdamCurvature",
    "EigenbasisCurvature",
    "ExampleEKFACCurvature",
    "KernelCurvature",
    "KroneckerCurvature",
    "Slot",
    "SplitCurvature",
    "UnitWiseCurvature",
    "WoodburyCurvature",
    "refreshed",
    "where_chosen",
]
