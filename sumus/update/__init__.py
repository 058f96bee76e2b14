"""Transforms change an update between the device and the sum. Each has one half for the device and one for the server."""

from sumus.update.clip import clip_buffers as clip_buffers
from sumus.update.clip import clip_by_global_norm as clip_by_global_norm
from sumus.update.quantize import quantize as quantize
from sumus.update.rotate import rotate as rotate
from sumus.update.transform import Context as Context
from sumus.update.transform import Props as Props
from sumus.update.transform import Transform as Transform
from sumus.update.transform import chain as chain
from sumus.update.weight import weight as weight
