"""Pretraining: the same token loss as sft; the samples are plain text with every token trained."""

from __future__ import annotations

from .sft import create as create
