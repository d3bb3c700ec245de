"""Adapters to training frameworks; each can be imported without its framework."""
