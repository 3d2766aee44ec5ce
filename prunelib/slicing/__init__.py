"""How wide is a layer?"""

from prunelib.slicing.accounting import ParameterCount, count_parameters, plan_of_size
from prunelib.slicing.redundancy import layer_redundancy
from prunelib.slicing.rotate import principal_axes, random_axes, slice_model
from prunelib.slicing.schedules import SlicePlan, constant, dynamic, final_slices, from_slices

__all__ = [
    "ParameterCount",
    "SlicePlan",
    "constant",
    "count_parameters",
    "dynamic",
    "final_slices",
    "from_slices",
    "layer_redundancy",
    "plan_of_size",
    "principal_axes",
    "random_axes",
    "slice_model",
]
