// Package openapi holds the OpenAPI document of the public API, generated from
// the proto files.
package openapi

import _ "embed"

// Document is OpenAPI 2.0 as JSON.
//
//go:embed cloudcode.swagger.json
var Document []byte
