package gateway

import (
	"bytes"
	"net/http"
	"strings"
	"time"
)

// frame is one event in the form of text/event-stream.
type frame struct {
	id    string // left out when empty: an empty id would make clients forget theirs
	event string
	data  []byte
}

// appendFrame adds the bytes of f to b. What would end a line early is dealt
// with here: data becomes several lines, ids that hold line ends or NUL are left
// out, as receivers would ignore them.
func appendFrame(b []byte, f frame) []byte {
	if f.id != "" && !strings.ContainsAny(f.id, "\r\n\x00") {
		b = append(b, "id: "...)
		b = append(b, f.id...)
		b = append(b, '\n')
	}
	if f.event != "" && !strings.ContainsAny(f.event, "\r\n") {
		b = append(b, "event: "...)
		b = append(b, f.event...)
		b = append(b, '\n')
	}
	data := f.data
	for {
		b = append(b, "data: "...)
		i := bytes.IndexAny(data, "\r\n")
		if i < 0 {
			b = append(b, data...)
			return append(b, '\n', '\n')
		}
		b = append(b, data[:i]...)
		b = append(b, '\n')
		if data[i] == '\r' && i+1 < len(data) && data[i+1] == '\n' {
			i++
		}
		data = data[i+1:]
	}
}

// streamWriter writes to a client that may be slow: every write gets its own
// deadline, so that a stream lives as long as somebody reads it.
type streamWriter struct {
	w       http.ResponseWriter
	control *http.ResponseController
	timeout time.Duration
}

func newStreamWriter(w http.ResponseWriter, timeout time.Duration) *streamWriter {
	return &streamWriter{w: w, control: http.NewResponseController(w), timeout: timeout}
}

// write sends b out at once. An error means that nobody reads any more.
func (s *streamWriter) write(b []byte) error {
	// Not every writer has deadlines (tests); then there are none.
	_ = s.control.SetWriteDeadline(time.Now().Add(s.timeout))
	if len(b) > 0 {
		if _, err := s.w.Write(b); err != nil {
			return err
		}
	}
	return s.control.Flush()
}

// done takes the deadline off again: the connection may serve further requests.
func (s *streamWriter) done() { _ = s.control.SetWriteDeadline(time.Time{}) }
