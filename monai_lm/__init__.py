"""Test-time refinement of predicted deformation fields with the factored Levenberg-Marquardt optimizer."""
