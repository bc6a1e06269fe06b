"""The methods by name; a new one is a file and a line here."""

from __future__ import annotations

from typing import Any

from alembert.common.errors import InputError
from alembert.methods.alembert import Alembert
from alembert.methods.base import Method
from alembert.methods.bert_emd import BertEmd
from alembert.methods.berxit import Berxit
from alembert.methods.deebert import DeeBert
from alembert.methods.distilbert import DistilBert
from alembert.methods.fastbert import FastBert
from alembert.methods.kd import Kd
from alembert.methods.lrc_bert import LrcBert
from alembert.methods.minilm import MiniLm
from alembert.methods.minilm_v2 import MiniLmV2
from alembert.methods.ms_bert import MsBert
from alembert.methods.pabee import Pabee
from alembert.methods.pkd import Pkd
from alembert.methods.tinybert import TinyBert

METHODS: dict[str, type[Method[Any]]] = {
    method.name: method
    for method in (
        Alembert,
        FastBert,
        MsBert,
        Pabee,
        DeeBert,
        Berxit,
        Kd,
        TinyBert,
        BertEmd,
        LrcBert,
        DistilBert,
        Pkd,
        MiniLm,
        MiniLmV2,
    )
}


def find_method(name: str) -> type[Method[Any]]:
    """The method called `name`; InputError naming the known ones otherwise."""
    if name not in METHODS:
        raise InputError(f"unknown method {name!r}: choose one of {', '.join(sorted(METHODS))}")
    return METHODS[name]
