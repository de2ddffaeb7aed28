"""Whole experiments: synthetic cohorts, sweeps of trials, baselines, statistics, reports."""
