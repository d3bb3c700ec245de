"""Providers, inputs, the gate, the clock and the predictions that every benchmark shares."""
