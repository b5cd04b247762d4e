"""Knowledge distillation from recipes: any loss plugin under any schedule plugin.

Everything a plugin or a script needs is here, loaded when it is first used.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kdkit.api import build_loss as build_loss
    from kdkit.api import check as check
    from kdkit.api import compare as compare
    from kdkit.api import train as train
    from kdkit.contracts.adapters import AnyBatchNorm as AnyBatchNorm
    from kdkit.contracts.adapters import aligned as aligned
    from kdkit.contracts.adapters import frozen_copy as frozen_copy
    from kdkit.contracts.adapters import pooled_head as pooled_head
    from kdkit.contracts.adapters import standardized as standardized
    from kdkit.contracts.dataset_source import DataInfo as DataInfo
    from kdkit.contracts.dataset_source import DatasetOptions as DatasetOptions
    from kdkit.contracts.dataset_source import DatasetSource as DatasetSource
    from kdkit.contracts.dataset_source import InMemory as InMemory
    from kdkit.contracts.dataset_source import Lacking as Lacking
    from kdkit.contracts.dataset_source import SharedStream as SharedStream
    from kdkit.contracts.dataset_source import Split as Split
    from kdkit.contracts.dataset_source import Stream as Stream
    from kdkit.contracts.dataset_source import Texts as Texts
    from kdkit.contracts.distributed import gather as gather
    from kdkit.contracts.ensembles import combined as combined
    from kdkit.contracts.ensembles import ensemble as ensemble
    from kdkit.contracts.ensembles import with_logits as with_logits
    from kdkit.contracts.features import as_map as as_map
    from kdkit.contracts.features import as_tokens as as_tokens
    from kdkit.contracts.features import as_vectors as as_vectors
    from kdkit.contracts.features import pooled_alike as pooled_alike
    from kdkit.contracts.features import resized as resized
    from kdkit.contracts.hooks import hookimpl as hookimpl
    from kdkit.contracts.loss import Context as Context
    from kdkit.contracts.loss import Loss as Loss
    from kdkit.contracts.loss_options import FeatureOptions as FeatureOptions
    from kdkit.contracts.loss_options import LayerPair as LayerPair
    from kdkit.contracts.loss_options import LossOptions as LossOptions
    from kdkit.contracts.loss_options import MapOptions as MapOptions
    from kdkit.contracts.loss_options import RelationOptions as RelationOptions
    from kdkit.contracts.loss_options import ResponseOptions as ResponseOptions
    from kdkit.contracts.loss_options import TokenOptions as TokenOptions
    from kdkit.contracts.loss_options import VectorOptions as VectorOptions
    from kdkit.contracts.model_source import AnswersOptions as AnswersOptions
    from kdkit.contracts.model_source import KnownAnswers as KnownAnswers
    from kdkit.contracts.model_source import Meaning as Meaning
    from kdkit.contracts.model_source import ModelOptions as ModelOptions
    from kdkit.contracts.model_source import ModelSource as ModelSource
    from kdkit.contracts.model_source import Normalize as Normalize
    from kdkit.contracts.model_source import Portable as Portable
    from kdkit.contracts.options import BOOKKEEPING as BOOKKEEPING
    from kdkit.contracts.options import CODE as CODE
    from kdkit.contracts.options import Arguments as Arguments
    from kdkit.contracts.options import NetworkArguments as NetworkArguments
    from kdkit.contracts.options import Options as Options
    from kdkit.contracts.options import Ramp as Ramp
    from kdkit.contracts.options import Rampable as Rampable
    from kdkit.contracts.options import RecipePath as RecipePath
    from kdkit.contracts.peers import PeerOptions as PeerOptions
    from kdkit.contracts.records import Batch as Batch
    from kdkit.contracts.records import Outputs as Outputs
    from kdkit.contracts.schedule import Lesson as Lesson
    from kdkit.contracts.schedule import Model as Model
    from kdkit.contracts.schedule import Models as Models
    from kdkit.contracts.schedule import Schedule as Schedule
    from kdkit.contracts.schedule import ScheduleOptions as ScheduleOptions
    from kdkit.contracts.schedule import Stage as Stage
    from kdkit.contracts.schedule import by_class as by_class
    from kdkit.contracts.schedule import see as see
    from kdkit.contracts.schedule import teach as teach
    from kdkit.contracts.schedule import turned as turned
    from kdkit.errors import DataError as DataError
    from kdkit.errors import Interrupted as Interrupted
    from kdkit.errors import KdkitError as KdkitError
    from kdkit.errors import ModelError as ModelError
    from kdkit.errors import PluginError as PluginError
    from kdkit.errors import RecipeError as RecipeError
    from kdkit.errors import RunError as RunError
    from kdkit.errors import ShapeError as ShapeError
    from kdkit.errors import TapError as TapError
    from kdkit.models.backbone import Backbone as Backbone
    from kdkit.models.normalization import NormalizationAdapter as NormalizationAdapter
    from kdkit.models.tapped import taps as taps
    from kdkit.models.trunk import Trunk as Trunk
    from kdkit.models.trunk import channels as channels
    from kdkit.students.loaded import load_student as load_student

__version__ = "0.1.0"

_HOME = {
    "contracts.records": "Batch Outputs",
    "contracts.features": "as_map as_tokens as_vectors pooled_alike resized",
    "contracts.adapters": "AnyBatchNorm aligned frozen_copy pooled_head standardized",
    "models.backbone": "Backbone",
    "contracts.distributed": "gather",
    "contracts.loss_options": (
        "FeatureOptions LayerPair LossOptions MapOptions RelationOptions ResponseOptions"
        " TokenOptions VectorOptions"
    ),
    "contracts.loss": "Context Loss",
    "contracts.schedule": (
        "Lesson Model Models Schedule ScheduleOptions Stage by_class see teach turned"
    ),
    "contracts.ensembles": "combined ensemble with_logits",
    "contracts.peers": "PeerOptions",
    "models.trunk": "Trunk channels",
    "recipe.dependencies": "beside code_digest",
    "errors": (
        "DataError Interrupted KdkitError ModelError PluginError RecipeError RunError ShapeError"
        " TapError"
    ),
    "contracts.hooks": "hookimpl",
    "contracts.options": (
        "BOOKKEEPING CODE Arguments NetworkArguments Options Ramp Rampable RecipePath"
    ),
    "contracts.dataset_source": (
        "DataInfo DatasetOptions DatasetSource InMemory Lacking SharedStream Split Stream Texts"
    ),
    "contracts.model_source": (
        "AnswersOptions KnownAnswers Meaning ModelOptions ModelSource Normalize Portable"
    ),
    "models.normalization": "NormalizationAdapter",
    "models.tapped": "taps",
    "students.loaded": "load_student",
    "api": "build_loss check compare train",
}
_WHERE = {name: module for module, names in _HOME.items() for name in names.split()}
__all__ = sorted(_WHERE)


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'kdkit' has no attribute '{name}'")
    value = getattr(importlib.import_module(f"kdkit.{_WHERE[name]}"), name)
    globals()[name] = value  # the next access does not come here
    return value


def __dir__() -> list[str]:
    return __all__
