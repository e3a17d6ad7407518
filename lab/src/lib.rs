//! Evaluation, calibration, link emulation and plots.
