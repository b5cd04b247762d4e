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
    from kdkit.backbone import Backbone as Backbone
    from kdkit.contracts import Context as Context
    from kdkit.contracts import Loss as Loss
    from kdkit.dataset_source import DataInfo as DataInfo
    from kdkit.dataset_source import DatasetOptions as DatasetOptions
    from kdkit.dataset_source import DatasetSource as DatasetSource
    from kdkit.dataset_source import InMemory as InMemory
    from kdkit.dataset_source import Lacking as Lacking
    from kdkit.dataset_source import SharedStream as SharedStream
    from kdkit.dataset_source import Split as Split
    from kdkit.dataset_source import Stream as Stream
    from kdkit.dataset_source import Texts as Texts
    from kdkit.ensembles import combined as combined
    from kdkit.ensembles import ensemble as ensemble
    from kdkit.ensembles import with_logits as with_logits
    from kdkit.errors import DataError as DataError
    from kdkit.errors import Interrupted as Interrupted
    from kdkit.errors import KdkitError as KdkitError
    from kdkit.errors import ModelError as ModelError
    from kdkit.errors import PluginError as PluginError
    from kdkit.errors import RecipeError as RecipeError
    from kdkit.errors import RunError as RunError
    from kdkit.errors import ShapeError as ShapeError
    from kdkit.errors import TapError as TapError
    from kdkit.forms import as_map as as_map
    from kdkit.forms import as_tokens as as_tokens
    from kdkit.forms import as_vectors as as_vectors
    from kdkit.forms import pooled_alike as pooled_alike
    from kdkit.forms import resized as resized
    from kdkit.gathering import gather as gather
    from kdkit.hookspecs import hookimpl as hookimpl
    from kdkit.loss_options import FeatureOptions as FeatureOptions
    from kdkit.loss_options import LayerPair as LayerPair
    from kdkit.loss_options import LossOptions as LossOptions
    from kdkit.loss_options import MapOptions as MapOptions
    from kdkit.loss_options import RelationOptions as RelationOptions
    from kdkit.loss_options import ResponseOptions as ResponseOptions
    from kdkit.loss_options import TokenOptions as TokenOptions
    from kdkit.loss_options import VectorOptions as VectorOptions
    from kdkit.normalization import NormalizationAdapter as NormalizationAdapter
    from kdkit.options import BOOKKEEPING as BOOKKEEPING
    from kdkit.options import CODE as CODE
    from kdkit.options import Arguments as Arguments
    from kdkit.options import NetworkArguments as NetworkArguments
    from kdkit.options import Options as Options
    from kdkit.options import Ramp as Ramp
    from kdkit.options import Rampable as Rampable
    from kdkit.options import RecipePath as RecipePath
    from kdkit.parts import AnyBatchNorm as AnyBatchNorm
    from kdkit.parts import aligned as aligned
    from kdkit.parts import frozen_copy as frozen_copy
    from kdkit.parts import pooled_head as pooled_head
    from kdkit.parts import standardized as standardized
    from kdkit.peers import PeerOptions as PeerOptions
    from kdkit.providers import AnswersOptions as AnswersOptions
    from kdkit.providers import KnownAnswers as KnownAnswers
    from kdkit.providers import Meaning as Meaning
    from kdkit.providers import ModelOptions as ModelOptions
    from kdkit.providers import ModelSource as ModelSource
    from kdkit.providers import Normalize as Normalize
    from kdkit.providers import Portable as Portable
    from kdkit.records import Batch as Batch
    from kdkit.records import Outputs as Outputs
    from kdkit.tapping import taps as taps
    from kdkit.teaching import Lesson as Lesson
    from kdkit.teaching import Model as Model
    from kdkit.teaching import Models as Models
    from kdkit.teaching import Schedule as Schedule
    from kdkit.teaching import ScheduleOptions as ScheduleOptions
    from kdkit.teaching import Stage as Stage
    from kdkit.teaching import by_class as by_class
    from kdkit.teaching import see as see
    from kdkit.teaching import teach as teach
    from kdkit.teaching import turned as turned
    from kdkit.trained import load_student as load_student
    from kdkit.trunk import Trunk as Trunk
    from kdkit.trunk import channels as channels

__version__ = "0.1.0"

_HOME = {
    "records": "Batch Outputs",
    "forms": "as_map as_tokens as_vectors pooled_alike resized",
    "parts": "AnyBatchNorm aligned frozen_copy pooled_head standardized",
    "backbone": "Backbone",
    "gathering": "gather",
    "loss_options": "FeatureOptions LayerPair LossOptions MapOptions RelationOptions ResponseOptions TokenOptions VectorOptions",
    "contracts": "Context Loss",
    "teaching": "Lesson Model Models Schedule ScheduleOptions Stage by_class see teach turned",
    "ensembles": "combined ensemble with_logits",
    "peers": "PeerOptions",
    "trunk": "Trunk channels",
    "depends": "beside code_digest",
    "errors": "DataError Interrupted KdkitError ModelError PluginError RecipeError RunError ShapeError TapError",
    "hookspecs": "hookimpl",
    "options": "BOOKKEEPING CODE Arguments NetworkArguments Options Ramp Rampable RecipePath",
    "dataset_source": "DataInfo DatasetOptions DatasetSource InMemory Lacking SharedStream Split Stream Texts",
    "providers": "AnswersOptions KnownAnswers Meaning ModelOptions ModelSource Normalize Portable",
    "normalization": "NormalizationAdapter",
    "tapping": "taps",
    "trained": "load_student",
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
