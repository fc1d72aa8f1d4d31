# ruff: noqa: RUF001 - Chinese texts have Chinese punctuation
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType

import pytest

from loki_attn.evaluate.longbench import words


@pytest.fixture
def install(monkeypatch):
    """Make jieba missing, or a stand-in that cuts at bars."""

    def change(module):
        monkeypatch.setitem(sys.modules, "jieba", module)
        words.segmenter.cache_clear()
        words._jieba.cache_clear()

    yield change
    monkeypatch.undo()
    words.segmenter.cache_clear()
    words._jieba.cache_clear()


def stand_in():
    module = ModuleType("jieba")
    module.__spec__ = ModuleSpec("jieba", None)
    module.setLogLevel = lambda level: None
    module.initialize = lambda: None
    module.cut = lambda text: iter(text.split("|"))
    return module


def test_jieba_cuts_chinese_where_it_is_installed(install):
    install(stand_in())
    assert words.segmenter() == "jieba"
    assert words.segments("灯塔|在|北边") == ["灯塔", "在", "北边"]
    assert words.chinese_words("“灯塔”|，|在 |ABC") == ["灯塔", "在", "abc"]


def test_characters_are_words_without_jieba(install, monkeypatch):
    monkeypatch.setattr(words.importlib.util, "find_spec", lambda name: None)
    install(stand_in())
    assert words.segmenter() == "characters"
    assert words.segments("第 12章，ABC好") == ["第", "12", "章", "，", "ABC", "好"]


def test_english_words():
    assert words.english_words("The fox's den -- an OLD one; theatre") == [
        "foxs",
        "den",
        "old",
        "one",
        "theatre",
    ]
