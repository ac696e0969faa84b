package gateway

import (
	"context"
	"errors"
	"io"
	"mime"
	"net/http"
	"path"
	"strings"
	"time"

	"google.golang.org/grpc/codes"

	cloudcodev1 "github.com/cloudcode-dev/cloudcode/proto/cloudcode/v1"
)

const (
	tarType = "application/x-tar"
	// archiveChunk is how much of an upload goes to the server in one message.
	archiveChunk = 256 << 10
	// archiveWrite is how much goes to a client at a time: each write has
	// WriteTimeout, and a slow client must get through that.
	archiveWrite = 32 << 10
)

// readArchive serves GET /v1/sessions/{id}/archive?path=…&checkpoint=…: files of
// a session as a tar archive. Nothing is kept here: what the client does not take
// waits at its node. Errors come as such until the first byte; after that the
// connection is cut, so that nobody takes a part for the whole.
func (g *Gateway) readArchive(w http.ResponseWriter, r *http.Request, name string) {
	q := r.URL.Query()
	ctx, cancel := context.WithCancel(r.Context())
	defer cancel()
	stream, err := g.sessions.ReadArchive(ctx, &cloudcodev1.ReadArchiveRequest{
		Name: name, Path: q.Get("path"), Checkpoint: q.Get("checkpoint"),
	})
	var resp *cloudcodev1.ReadArchiveResponse
	for err == nil && len(resp.GetData()) == 0 {
		resp, err = stream.Recv()
	}
	if err != nil && !errors.Is(err, io.EOF) {
		if r.Context().Err() == nil {
			g.writeStatus(w, r, err)
		}
		return
	}
	h := w.Header()
	h.Set("Content-Type", tarType)
	h.Set("Content-Disposition", mime.FormatMediaType("attachment", map[string]string{"filename": archiveName(name, q.Get("path"))}))
	h.Set("X-Accel-Buffering", "no")
	w.WriteHeader(http.StatusOK)
	sw := newStreamWriter(w, g.cfg.WriteTimeout)
	defer sw.done()
	for err == nil {
		for data := resp.GetData(); len(data) > 0; {
			n := min(len(data), archiveWrite)
			if sw.write(data[:n]) != nil {
				panic(http.ErrAbortHandler) // nobody reads any more
			}
			data = data[n:]
		}
		resp, err = stream.Recv()
	}
	if !errors.Is(err, io.EOF) {
		g.log.WarnContext(ctx, "an archive broke off", "session", name, "error", err)
		panic(http.ErrAbortHandler)
	}
}

// archiveName is what a browser calls the file.
func archiveName(name, dir string) string {
	out := strings.TrimPrefix(name, "sessions/")
	if base := path.Base(path.Clean("/" + dir)); base != "/" {
		out += "-" + base
	}
	return strings.ToValidUTF8(out, "_") + ".tar"
}

// writeArchive serves PUT /v1/sessions/{id}/archive?path=…: unpacks the tar
// archive that is the body. An upload that breaks off is broken off at the
// server, too, which so does not take it for all.
func (g *Gateway) writeArchive(w http.ResponseWriter, r *http.Request, name string) {
	if kind, _, err := mime.ParseMediaType(r.Header.Get("Content-Type")); err != nil || kind != tarType {
		writeError(w, r, http.StatusUnsupportedMediaType, problem{
			code: codes.InvalidArgument, reason: "NOT_AN_ARCHIVE", message: "Send a tar archive, with Content-Type: " + tarType + ".",
		})
		return
	}
	ctx, cancel := context.WithCancel(r.Context())
	defer cancel()
	stream, err := g.sessions.WriteArchive(ctx)
	if err == nil {
		err = stream.Send(&cloudcodev1.WriteArchiveRequest{Name: name, Path: r.URL.Query().Get("path")})
	}
	control := http.NewResponseController(w)
	defer func() { _ = control.SetReadDeadline(time.Time{}) }() // the connection may serve further requests
	buf := make([]byte, archiveChunk)
	for err == nil {
		// Not every reader has deadlines (tests); then there are none.
		_ = control.SetReadDeadline(time.Now().Add(g.cfg.WriteTimeout))
		n, rerr := r.Body.Read(buf)
		if n > 0 {
			err = stream.Send(&cloudcodev1.WriteArchiveRequest{Data: buf[:n]})
		}
		if errors.Is(rerr, io.EOF) {
			break
		}
		if rerr != nil && err == nil {
			cancel()
			writeError(w, r, http.StatusBadRequest, problem{
				code: codes.InvalidArgument, reason: "UPLOAD_BROKE_OFF", message: "The archive did not arrive completely: " + rerr.Error(),
			})
			return
		}
	}
	var resp *cloudcodev1.WriteArchiveResponse
	if err == nil || errors.Is(err, io.EOF) { // EOF: the server has said why
		resp, err = stream.CloseAndRecv()
	}
	if err != nil {
		if r.Context().Err() == nil {
			g.writeStatus(w, r, err)
		}
		return
	}
	w.Header().Set("Content-Type", "application/json")
	_, _ = w.Write(append(toJSON(resp), '\n')) // a client that is gone needs no answer
}
