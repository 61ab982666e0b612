"""nuScenes detection metrics on arrays: the numbers of nuscenes-devkit, vectorised."""
