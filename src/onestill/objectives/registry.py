"""Which objectives there are, and how a batch is divided between them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pydantic import create_model

from onestill.objectives.anchors import Anchors, AnchorSettings
from onestill.objectives.base import Objective
from onestill.objectives.boot import Boot, BootSettings
from onestill.objectives.corrector import Corrector, CorrectorSettings
from onestill.objectives.flow_map import FlowMap, FlowMapSettings

OBJECTIVES: tuple[type[Objective[Any]], ...] = (
    Boot,
    Anchors,
    Corrector,
    FlowMap,
)
"""Every objective, in the order in which they draw and in which their rows stand in a batch."""

if TYPE_CHECKING:

    class ObjectiveSettings(FlowMapSettings, CorrectorSettings, AnchorSettings, BootSettings):
        """The settings of every objective."""

else:
    # The settings of whatever is registered; the help shows those of the last base first.
    _OWN = tuple(objective.Settings for objective in reversed(OBJECTIVES))
    ObjectiveSettings = create_model("ObjectiveSettings", __base__=_OWN, __doc__="The settings of every objective.")


def rows_of(settings: Any, batch_size: int, progress: float = 1.0) -> dict[type[Objective[Any]], int]:
    """Return the rows of a batch for each objective that takes some; what the others leave may be too few, or none.

    `progress` is the share of the training that is done: an objective that begins later takes none yet.
    """
    begun = [objective for objective in OBJECTIVES if objective.begins(settings) <= progress]
    wanted = {objective: objective.num_rows(settings, batch_size) for objective in begun}
    left = batch_size - sum(num for num in wanted.values() if num is not None)
    return {objective: left if num is None else num for objective, num in wanted.items() if num != 0}
