"""Set prediction: targets, scoring of classes, matching, and losses of matched queries."""
