// Package checkpoint keeps consistent points of a session's files in an object
// store: content-addressed, compressed, perhaps encrypted chunks in packs; a manifest
// for each checkpoint; and a head per session, moved by conditional writes, which is
// also the mark of who owns the session.
package checkpoint
