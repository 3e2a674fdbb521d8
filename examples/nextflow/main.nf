// A list of slides in `shards` tasks:
//   nextflow run main.nf --slides slides.csv --output out --shards 16 --options '--organ breast'
// Slides are found in `output`, with summary.csv and cohort.html. A task that fails is tried again and goes on where it was.

nextflow.enable.dsl = 2

params.slides = 'slides.csv'
params.output = 'out'
params.shards = 4
params.options = ''
params.cellslide = 'cellslide'

process RUN {
    label 'gpu'
    tag "${number}/${params.shards}"

    input:
    val number
    val slides
    val output

    output:
    val number

    // The list and the results stay where they are: a task's own folder starts empty each time, and would forget the parts.
    script:
    """
    ${params.cellslide} run '${slides}' --output '${output}' --shard ${number}/${params.shards} --no-progress ${params.options}
    """
}

workflow {
    slides = file(params.slides, checkIfExists: true).toAbsolutePath().toString()
    output = file(params.output).toAbsolutePath().toString()
    RUN(Channel.of(1..(params.shards as int)), slides, output)
}
