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


def is_map(settings: Any) -> bool:
    """Return whether a run trains its student from any level to any other, so that it draws in several steps."""
    return any(kind.is_map(settings) for kind in OBJECTIVES)


def objectives_of(settings: Any, batch_size: int) -> list[type[Objective[Any]]]:
    """Return the objectives that take rows at any time: what others take from late on may be all that one had."""
    taken = {kind for begun in OBJECTIVES for kind in rows_of(settings, batch_size, begun.begins(settings))}
    return [kind for kind in OBJECTIVES if kind in taken]


def rows_of(settings: Any, batch_size: int, progress: float = 1.0) -> dict[type[Objective[Any]], int]:
    """Return the rows of a batch for each objective that takes some; below 0 where more are asked for than there are.

    `progress` is the share of the training that is done: an objective that begins later takes none yet. Those that take
    of what others leave are asked after them.
    """
    begun = [kind for kind in OBJECTIVES if kind.begins(settings) <= progress]
    left, rows = batch_size, dict[type[Objective[Any]], int]()
    for kind in sorted(begun, key=lambda kind: kind.turn):
        rows[kind] = kind.num_rows(settings, batch_size, left)
        left -= rows[kind]
    return {kind: rows[kind] for kind in begun if rows[kind]}
