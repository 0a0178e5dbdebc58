"""What a profile saves: roofline and fleet planner."""
