"""Where training examples come from: every layout MiniGPT-4's data has had, behind one interface.

Each reader refuses what leaves its folder, bounds what it reads, and says of a bad record in one sentence what is
wrong. Knows pictures as bytes and text as strings; opens no picture, knows no tokenizer and no model.
"""

from minigpt4.data.sources.formats import FORMATS, open_source

__all__ = ["FORMATS", "open_source"]
