package gateway

import (
	"bytes"
	"crypto/sha256"
	_ "embed"
	"encoding/base64"
	"html/template"
	"net/http"
	"strconv"
)

//go:embed web/status.html
var statusHTML string

//go:embed web/status.css
var statusCSS string

//go:embed web/dashboard.html
var dashboardHTML string

//go:embed web/dashboard.css
var dashboardCSS string

//go:embed web/dashboard.js
var dashboardJS string

var (
	statusPage    = template.Must(template.New("status").Parse(statusHTML))
	dashboardPage = template.Must(template.New("dashboard").Parse(dashboardHTML))

	// The pages hold their styles and script, and the policy names them by
	// digest: nothing else runs on this origin, whatever finds its way in.
	statusPolicy = "default-src 'none'; style-src " + digestOf(statusCSS) +
		"; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
	dashboardPolicy = "default-src 'none'; style-src " + digestOf(dashboardCSS) + "; script-src " + digestOf(dashboardJS) +
		"; connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'"
)

func digestOf(s string) string {
	sum := sha256.Sum256([]byte(s))
	return "'sha256-" + base64.StdEncoding.EncodeToString(sum[:]) + "'"
}

// page is what status.html shows: why there is no session to be seen.
type page struct {
	Style                          template.CSS
	Title, Session, State          string
	Reason, Message, Phase, Detail string
	Percent                        int64
	HasPercent                     bool
	Busy                           bool
	Reload                         int    // seconds; 0: not by itself
	Dashboard                      string // address of the session in it
}

func writePage(w http.ResponseWriter, httpStatus int, p page) {
	p.Style = template.CSS(statusCSS) //nolint:gosec // our own file
	writeHTML(w, httpStatus, statusPolicy, statusPage, p)
}

func writeHTML(w http.ResponseWriter, httpStatus int, policy string, t *template.Template, data any) {
	var buf bytes.Buffer
	if err := t.Execute(&buf, data); err != nil {
		http.Error(w, "internal error", http.StatusInternalServerError) // a mistake in the page, seen by tests
		return
	}
	h := w.Header()
	h.Set("Content-Type", "text/html; charset=utf-8")
	h.Set("Content-Length", strconv.Itoa(buf.Len()))
	h.Set("Content-Security-Policy", policy)
	h.Set("X-Content-Type-Options", "nosniff")
	h.Set("Referrer-Policy", "no-referrer")
	h.Set("Cache-Control", "no-store")
	w.WriteHeader(httpStatus)
	_, _ = w.Write(buf.Bytes()) // a client that is gone needs no answer
}

// dashboardHandler serves the dashboard, which is one page.
func (g *Gateway) dashboardHandler() http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.Method != http.MethodGet && r.Method != http.MethodHead {
			w.Header().Set("Allow", "GET, HEAD")
			http.Error(w, "method not allowed", http.StatusMethodNotAllowed)
			return
		}
		if p := r.URL.Path; p != "/" && p != dashboardPath {
			http.Redirect(w, r, dashboardPath, http.StatusFound)
			return
		}
		writeHTML(w, http.StatusOK, dashboardPolicy, dashboardPage, struct {
			Style   template.CSS
			Script  template.JS
			BaseURI string
		}{template.CSS(dashboardCSS), template.JS(dashboardJS), g.baseURI.String()}) //nolint:gosec // our own files
	})
}
