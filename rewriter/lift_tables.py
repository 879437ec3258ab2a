"""The lift's tables: which function reads which ATen operation. An operation in neither table is a leaf."""

from refocus.lift import Handler
from refocus.lift_activations import ACTIVATIONS
from refocus.lift_joins import JOINS
from refocus.lift_pointwise import POINTWISE
from refocus.lift_reductions import REDUCTIONS
from refocus.lift_views import CREATIONS, VIEWS
from refocus.lift_windows import WINDOWS

MOVES: dict[str, Handler] = {**VIEWS, **JOINS, **WINDOWS}
OPERATIONS: dict[str, Handler] = {**POINTWISE, **ACTIVATIONS, **REDUCTIONS, **CREATIONS}
