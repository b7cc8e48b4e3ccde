"""Schedules, samplers, noise, masks and features: functions of tensors and numbers, and generators of rows. Of the
other modules, only ``jobs`` and ``rows`` are imported."""
