"""Least squares fits of the compensated cut: of one matrix, of a layer with experts."""
