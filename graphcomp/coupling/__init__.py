"""Which channels live or die together: the axis algebra, the rules, the groups."""
