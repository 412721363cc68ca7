"""Whole models of other libraries on neighborhood attention: :mod:`diffusers` and :mod:`transformers` models.

Import the module that you need, say ``from gna_flex.integrations import diffusers``; neither needs its library before
a model of it is handed over.
"""
