package gateway

import (
	"context"
	"errors"
	"io"
	"net/http"
	"time"

	"github.com/grpc-ecosystem/grpc-gateway/v2/runtime"
	"github.com/grpc-ecosystem/grpc-gateway/v2/utilities"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/encoding/protojson"

	cloudcodev1 "github.com/cloudcode-dev/cloudcode/proto/cloudcode/v1"
)

// quietStart is how long headers wait for a first line: a log that is followed
// may have none for a long time.
const quietStart = 500 * time.Millisecond

// serveLogs streams what the container wrote: as plain lines to those who
// accept text/plain, otherwise as JSON, one `{"result": LogEntry}` a line and
// `{"error": Status}` as the last one if the stream breaks.
func (g *Gateway) serveLogs(w http.ResponseWriter, r *http.Request, name string) {
	req := &cloudcodev1.ReadSessionLogsRequest{}
	if err := runtime.PopulateQueryParameters(req, r.URL.Query(), utilities.NewDoubleArray(nil)); err != nil {
		g.writeStatus(w, r, status.Error(codes.InvalidArgument, err.Error()))
		return
	}
	req.Name = name
	ctx, cancel := context.WithCancel(r.Context())
	defer cancel()
	defer context.AfterFunc(g.draining, cancel)()

	type item struct {
		entry *cloudcodev1.LogEntry
		err   error
	}
	entries := make(chan item, 256)
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		stream, err := g.sessions.ReadSessionLogs(ctx, req)
		for {
			it := item{err: err}
			if err == nil {
				it.entry, it.err = stream.Recv()
			}
			select {
			case entries <- it:
			case <-ctx.Done():
				return
			}
			if it.err != nil {
				return
			}
		}
	}()
	defer func() { cancel(); <-ended }()

	plain := prefersText(r)
	sw := newStreamWriter(w, g.cfg.WriteTimeout)
	defer sw.done()
	begun := false
	begin := func() {
		if begun {
			return
		}
		begun = true
		w.Header().Set("Content-Type", "application/x-ndjson")
		if plain {
			w.Header().Set("Content-Type", "text/plain; charset=utf-8")
		}
		w.Header().Set("X-Accel-Buffering", "no")
		w.WriteHeader(http.StatusOK)
	}
	quiet := time.NewTimer(quietStart)
	defer quiet.Stop()
	var buf []byte
	for {
		var it item
		select {
		case it = <-entries:
		case <-quiet.C:
			begin()
			if sw.write(nil) != nil {
				return
			}
			continue
		case <-ctx.Done():
			return
		}
		switch {
		case it.err != nil && !begun && !errors.Is(it.err, io.EOF):
			if ctx.Err() == nil {
				g.writeStatus(w, r, it.err)
			}
			return
		case errors.Is(it.err, io.EOF):
			begin()
			_ = sw.write(buf)
			return
		case it.err != nil:
			if ctx.Err() != nil {
				return
			}
			if !plain {
				if b, err := protojson.Marshal(status.Convert(it.err).Proto()); err == nil {
					buf = append(append(append(buf, `{"error":`...), compact(b)...), "}\n"...)
				}
			}
			_ = sw.write(buf)
			// Cut off: the reader must not take this for the whole log.
			panic(http.ErrAbortHandler)
		case plain:
			begin()
			buf = append(append(buf, it.entry.GetLine()...), '\n')
		default:
			begin()
			buf = append(append(append(buf, `{"result":`...), toJSON(it.entry)...), "}\n"...)
		}
		if len(entries) == 0 || len(buf) >= flushSize {
			if sw.write(buf) != nil {
				return
			}
			buf = buf[:0]
		}
	}
}
