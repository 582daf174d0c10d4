"""Pictures and pages people judge a tracker by."""
