// Nuclei of the selected annotations, by cellslide: select annotations, then run this in the script editor.
// The regions go out as GeoJSON, `cellslide run --roi` finds and types their nuclei, and these come back as detections.
// The command, the organ, and anything else that `cellslide run --help` lists.
def cellslide = System.getenv("CELLSLIDE") ?: "cellslide"
def options = ["--organ", "breast"]

def chosen = getSelectedObjects().findAll { it.isAnnotation() }
if (chosen.isEmpty()) {
    println "Select one or more annotations first."
    return
}
def uris = getCurrentServer().getURIs()
def slide = new File(uris.iterator().next())
def folder = File.createTempDir("cellslide", "")
def regions = new File(folder, "regions.geojson")
exportObjectsToGeoJson(chosen, regions.getAbsolutePath(), "FEATURE_COLLECTION")

def command = [cellslide, "run", slide.getAbsolutePath(), "--output", folder.getAbsolutePath(),
               "--roi", regions.getAbsolutePath(), "--format", "geojson", "--no-progress"] + options
println command.join(" ")
def process = new ProcessBuilder(command).redirectErrorStream(true).start()
process.inputStream.eachLine { println it }
if (process.waitFor() != 0) {
    println "cellslide ended with ${process.exitValue()}; nothing was changed. Its files: ${folder}"
    return
}
def found = folder.listFiles().collectMany { it.isDirectory() ? it.listFiles() as List : [] }.find { it.name.startsWith("cells.geojson") }
def inside = getDetectionObjects().findAll { old -> chosen.any { it.getROI().contains(old.getROI().getCentroidX(), old.getROI().getCentroidY()) } }
removeObjects(inside, true)
importObjectsFromFile(found.getAbsolutePath())
resolveHierarchy()
println "${getDetectionObjects().size()} nuclei now; report: ${found.parent}/report.html"
