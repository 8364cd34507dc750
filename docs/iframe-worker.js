// A page opened from disk may not start a web worker, which the search runs in: there a hidden frame stands in for it.
if (location.protocol === "file:") {
  window.Worker = class extends EventTarget {
    constructor(url) {
      super()
      this.frame = document.createElement("iframe")
      this.frame.hidden = true
      this.loaded = new Promise(resolve => (this.frame.onload = resolve))
      this.frame.answer = data => this.dispatchEvent(new MessageEvent("message", { data }))
      this.frame.srcdoc =
        `<script>postMessage = frameElement.answer; importScripts = () => {}</script><script src="${url}"></script>`
      document.body.append(this.frame)
    }
    postMessage(data) {
      this.loaded.then(() => this.frame.contentWindow.dispatchEvent(new MessageEvent("message", { data })))
    }
    terminate() {
      this.frame.remove()
    }
  }
}
