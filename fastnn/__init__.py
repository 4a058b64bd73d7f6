"""fastnn: hand-written kernels for linear, conv2d, rnn and attention, as drop-in functions and modules for PyTorch."""

__version__ = "0.1.0"

from fastnn import functional, nn
from fastnn._fallback import get_fallback, set_fallback
from fastnn.accelerate import accelerate, explain, restore
from fastnn.freeze import freeze

__all__ = ["accelerate", "explain", "freeze", "functional", "get_fallback", "nn", "restore", "set_fallback"]
