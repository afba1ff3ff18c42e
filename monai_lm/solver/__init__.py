"""The method: levels, steps, damping, acceptance; :func:`monai_lm.refine` and :class:`monai_lm.FactoredLM`."""
