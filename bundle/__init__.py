"""Library of the brain_fmri_roi_mae bundle: from BOLD NIfTI to an evaluated, pretrained encoder."""
