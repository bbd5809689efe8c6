"""Static pages for people, made from the tracking store alone: leaderboard, campaigns, model cards, reproduction."""
