package gateway

import (
	"bytes"
	"encoding/json"
	"net/http"
	"strconv"
	"strings"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/encoding/protojson"

	"github.com/cloudcode-dev/cloudcode/internal/grpcerr"
)

// problem is an error of the gateway itself, in the form of the API's errors.
type problem struct {
	code     codes.Code
	reason   string // UPPER_SNAKE_CASE
	message  string // for a person, with what to do
	metadata map[string]string
}

// body returns google.rpc.Status as JSON.
func (p problem) body() []byte {
	st, err := status.New(p.code, p.message).WithDetails(&errdetails.ErrorInfo{
		Reason: p.reason, Domain: grpcerr.Domain, Metadata: p.metadata,
	})
	if err == nil {
		var b []byte
		if b, err = protojson.Marshal(st.Proto()); err == nil {
			return compact(b)
		}
	}
	return []byte(`{"code":13,"message":"internal error"}`) // a detail that cannot be marshalled
}

// compact takes out the spaces that protojson puts in at random.
func compact(b []byte) []byte {
	var out bytes.Buffer
	out.Grow(len(b))
	if json.Compact(&out, b) != nil {
		return b
	}
	return out.Bytes()
}

// writeError answers with a page to browsers that open one, with JSON to
// programs, and with text to those that ask for that.
func writeError(w http.ResponseWriter, r *http.Request, httpStatus int, p problem) {
	h := w.Header()
	h.Set("Cache-Control", "no-store")
	h.Set("X-Content-Type-Options", "nosniff")
	var body []byte
	switch {
	case wantsPage(r):
		pg := page{Title: http.StatusText(httpStatus), Message: p.message, Reason: p.reason}
		if h.Get("Retry-After") != "" {
			pg.Reload = 3
		}
		writePage(w, httpStatus, pg)
		return
	case prefersText(r):
		h.Set("Content-Type", "text/plain; charset=utf-8")
		body = []byte(p.message + "\n")
	default:
		h.Set("Content-Type", "application/json")
		body = append(p.body(), '\n')
	}
	h.Set("Content-Length", strconv.Itoa(len(body)))
	w.WriteHeader(httpStatus)
	_, _ = w.Write(body) // a client that is gone needs no answer
}

// wantsPage reports whether a browser wants to show the answer to a person.
func wantsPage(r *http.Request) bool {
	if r.Method != http.MethodGet && r.Method != http.MethodHead {
		return false
	}
	if mode := r.Header.Get("Sec-Fetch-Mode"); mode != "" && mode != "navigate" {
		return false
	}
	return strings.Contains(r.Header.Get("Accept"), "text/html")
}

func prefersText(r *http.Request) bool {
	accept := r.Header.Get("Accept")
	return strings.HasPrefix(accept, "text/plain") || (strings.HasPrefix(accept, "text/") && !strings.Contains(accept, "json"))
}
