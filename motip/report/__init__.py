"""Reports: dashboards, failure pictures, annotated videos and the HTML page of a curriculum."""
