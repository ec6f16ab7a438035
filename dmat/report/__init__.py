"""What the report says and shows, from plain numbers: the comparison of arms, what they cost, charts, the page."""
