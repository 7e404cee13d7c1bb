/** The release of onnxruntime that the page is built with. */
declare const __ONNXRUNTIME__: string;
