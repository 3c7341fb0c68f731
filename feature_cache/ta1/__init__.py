"""The feature set `ta1`: standard technical indicators over bars, and what a partner instrument says."""
