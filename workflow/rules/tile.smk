rule tile_slide:
    output:
        coords="results/{cohort}/tiles/{slide}.npy",
        record="results/{cohort}/tiles/{slide}.json",
        thumbnail="results/{cohort}/tiles/{slide}.thumbnail.jpg",
        mask="results/{cohort}/tiles/{slide}.mask.png",
        contours="results/{cohort}/tiles/{slide}.geojson",
    log:
        "results/{cohort}/logs/tile/{slide}.log",
    wildcard_constraints:
        cohort=one_of(TILED),
    conda:
        "../../envs/preprocessing.yaml"
    resources:
        mem_mb=growing(2000),
        runtime=growing(15),
    params:
        slide=slide_file,
        version=slide_version,
        settings=tiling_settings,
        mpp=mpp_option,
        mask=mask_option,
        mask_version=mask_version,
        code=code_digest("preprocessing.tile"),
    shell:
        "python -m preprocessing tile --slide={params.slide:q} --slide-id {wildcards.slide} --cohort {wildcards.cohort}"
        " --settings {params.settings:q} {params.mpp} {params.mask:q} --coords {output.coords}"
        " --record {output.record} --thumbnail {output.thumbnail} --mask {output.mask} --contours {output.contours}"
        " > {log} 2>&1"


rule contact_sheet:
    input:
        cohort_pictures,
    output:
        "results/{cohort}/contact_sheet.html",
    log:
        "results/{cohort}/logs/contact_sheet.log",
    conda:
        "../../envs/gmmamba.yaml"
    resources:
        mem_mb=growing(2000),
        runtime=growing(30),
    params:
        sheet=sheet_file,
        content=sheet_digest,
        tiles="results/{cohort}/tiles",
        code=code_digest("gmmamba.contact_sheet", files=(ROOT / "gmmamba/contact_sheet.html.j2",)),
    shell:
        "python -m gmmamba contact-sheet --cohort {wildcards.cohort} --sheet={params.sheet:q} --tiles {params.tiles}"
        " --output {output} > {log} 2>&1"
